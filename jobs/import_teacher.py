"""``decant import-teacher``: a TinyLLaVA checkpoint becomes a transformers folder, which any stage takes as teacher."""

from pathlib import Path

from rich.console import Console

from pipeline.folders import new_folder
from pipeline.hub import folder_of
from pipeline.tinyllava.folder import write_llava


def import_teacher(source: str, destination: Path, template: str | None, out: Console) -> None:
    """Writes the Llava to ``destination``, which must not exist; a failure leaves nothing there.

    ``source`` is a folder or a name on the hub.

    Raises:
        ConfigInvalid: the source is no TinyLLaVA checkpoint, or not one that Llava can hold exactly.
        StoreUnavailable: the destination cannot be written.
    """
    checkpoint = Path(folder_of(source))
    with new_folder(destination) as folder:
        said = write_llava(checkpoint, folder, template)
    out.print(
        f"[green]{destination}[/]: {said.language} with {said.vision}, {said.dtype}, {said.tensors} tensors; "
        f"template {said.template}, {said.image_tokens} positions an image ({said.aspect})"
        + (f"; the vocabulary was full: {said.rows} row added for <image>" if said.rows else "")
    )
