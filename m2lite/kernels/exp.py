"""The numbers of our float64 exponential, which NumPy and compiled code share. Imports neither."""

import math

LOG2_E = 1.4426950408889634
LN2_HIGH = 6.93147180369123816490e-01  # 33 significant bits, so that n * LN2_HIGH is exact
LN2_LOW = 1.90821492927058770002e-10
TAYLOR = tuple(1.0 / math.factorial(n) for n in range(13, -1, -1))
EXP_FLOOR = -700.0  # exp(-700) is 1e-304: far below what a sum of weights that starts at 1 can feel
