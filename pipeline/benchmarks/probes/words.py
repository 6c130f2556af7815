"""The words that probes are made of: common and short, so that most tokenizers have them whole.

The lists share no word, so a value is never part of a key.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    angry basic big blue bold brave brief bright broad brown calm cheap clean clear clever close cold cool crazy cruel
    curly dark dead deep dirty dry dull eager early easy empty equal fair false famous fast fat fine firm flat free
    fresh full funny gentle giant glad golden good grand great green grey happy hard heavy hidden high hollow hot huge
    humble idle jolly keen kind large late lazy light little lonely long loud low lucky mad main merry mild modern
    narrow new nice noisy odd old open orange pale perfect plain polite poor pretty proud public pure purple quick
    quiet rare raw ready red rich rough round royal sad safe sharp short shy silent silly silver simple slim slow small
    smart smooth soft solid sour square steady strange strict strong sudden sweet tall tame tender thick thin tight
    tiny tired tough true ugly warm weak wet white whole wide wild wise young
    """
)
NOUNS = _words(
    """
    actor agent artist author baby baker band bank barn beach bear bell bird boat bridge brother bus cabin camel camp
    captain car castle cat cave chair chicken child church city cloud coach coast cook corner cousin cow crowd crown
    dancer desert doctor dog dragon driver duck eagle engine farm farmer father field fish flag flower forest fox
    friend frog garden gate ghost girl goat guard guest guide harbor hill horse hotel house hunter island judge jungle
    king kitchen lady lake lamp lawyer leader lion lord market master mayor mine mirror monkey mother mountain mouse
    museum nurse ocean office owner painter palace park pilot pirate planet player poet pony prince prison queen rabbit
    ranch river road robot roof sailor scholar school shadow shark sheep ship shop singer sister snake soldier spider
    star station stone storm street student sun teacher temple tiger tower town train tree truck tunnel uncle valley
    village wagon wall whale window winter witch wolf woman worker writer
    """
)
VALUES = _words(
    """
    apple arrow basket bean bottle bowl box brass bread brick brush butter button cake candle candy card carrot chain
    cheese cherry clock coat coffee coin copper corn cotton cream cup dish dress egg flour fork fruit glass glove grape
    hammer hat honey ink jacket jar juice key knife ladder leather lemon letter linen marble meal meat milk mint
    mushroom nail needle nut oil onion paint paper pearl pen pencil pepper piano pie pipe plate potato powder purse
    ribbon rice ring rope salad salt sand sauce scarf shell shirt shoe silk soap soup spoon steel sugar tea thread
    ticket tomato tool towel violin wheel wire wood wool
    """
)
FIRST_NAMES = _words(
    """
    Adam Alan Albert Alice Amy Andrew Angela Anna Anthony Arthur Barbara Ben Betty Brian Bruce Carl Carol Charles Chris
    Claire Daniel David Diana Donald Edward Ellen Emily Emma Eric Frank Fred George Grace Harry Helen Henry Howard Jack
    James Jane Janet Jason Jean Jennifer Jim Joan Joe John Joseph Judy Julia Karen Kate Keith Kevin Larry Laura Lisa
    Louis Lucy Margaret Maria Mark Martin Mary Matthew Michael Nancy Neil Nicole Oliver Oscar Patrick Paul Peter Philip
    Rachel Ralph Richard Robert Roger Roy Ruth Ryan Sam Sandra Sarah Scott Simon Sophie Stephen Steve Susan Thomas Tim
    Tom Tony Victor Walter William
    """
)
LAST_NAMES = _words(
    """
    Adams Allen Anderson Bailey Baker Barnes Bell Bennett Brooks Brown Butler Campbell Carter Clark Coleman Collins Cook
    Cooper Cox Cruz Davis Diaz Edwards Evans Fisher Flores Ford Foster Fox Garcia Gibson Gomez Gordon Graham Gray Green
    Griffin Hall Hamilton Harris Harrison Hayes Henderson Hill Holmes Hughes Hunt Jackson Jenkins Johnson Jones Jordan
    Kelly Kennedy King Knight Lee Lewis Long Lopez Marshall Mason Miller Mitchell Moore Morgan Morris Murphy Murray
    Myers Nelson Owens Palmer Parker Perez Perry Phillips Porter Powell Price Ramirez Reed Reyes Reynolds Rice
    Richardson Rivera Roberts Robinson Rogers Rose Ross Russell Sanchez Sanders Shaw Simpson Smith Spencer Stevens
    Stewart Stone Sullivan Taylor Thompson Torres Tucker Turner Walker Wallace Ward Warren Washington Watson Webb West
    White Williams Wilson Wood Woods Wright Young
    """
)
