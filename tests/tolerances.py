"""Every tolerance of the tests, with its reason, in one place."""

# float64 sums of a few thousand terms of size one: rounding stays below 1e-12; gradients add one more such sum.
FLOAT64 = 1e-10
# float32 logits of a small model: two orders of summation differ by some units in the last place of values up to ten.
FLOAT32_LOGITS = 2e-5
# A proportion estimated from n draws strays further than five standard deviations once in two million times.
SIGMAS = 5.0
# bfloat16 keeps eight bits: half a unit in the last place is 2^-9 of the value.
BFLOAT16_RELATIVE = 2.0**-8
