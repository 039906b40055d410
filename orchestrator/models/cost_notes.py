"""Why the figures of Table 1 (arXiv 1409.4842) differ from those of the network that it describes, row by row.

A row's multiply-adds are its weights times the positions of its output, so its two figures can be held against each
other: where the paper's operations fit our weights and its parameters do not, the parameters are the odd ones.
"""

from __future__ import annotations

_OPS_FIT = "the paper's operations fit ours, and its own parameters would give"

NOTES: dict[str, str] = {
    "conv1": "a 7x7 convolution of 64 filters has 9,408 weights; the paper's figures fit a depthwise-separable 7x7 "
    "with multiplier 8: 1,176 + 1,536 = 2,712 weights, 34.0M multiply-adds.",
    "conv2": "exact: 4,096 (1x1 reduction) + 110,592 (3x3) = 112K with K = 1024.",
    "3a": "159.5K, which the paper cuts to 159K.",
    "3b": f"379.0K; {_OPS_FIT} 305M, not 304M.",
    "4a": "parameters (364K) and operations (73M) of the paper agree with each other, so about 3K weights fewer were "
    "counted; the row's filter counts do not say where.",
    "4b": f"438.0K; {_OPS_FIT} the same 88M: a matter of rounding.",
    "4c": f"497.5K against 463K; {_OPS_FIT} 93M, not 100M.",
    "4d": f"590.5K against 580K; {_OPS_FIT} 116M, not 119M.",
    "4e": f"847.0K against 840K; {_OPS_FIT} 169M, not 170M.",
    "5a": "parameters (1072K) and operations (54M) of the paper agree with each other, so some 54K weights more were "
    "counted than the row's filters have (it names the same filters as 4e).",
    "5b": f"1,409K against 1388K; {_OPS_FIT} 70M, not 71M.",
    "linear": "exact: 1,024 x 1,000 weights = 1000K with K = 1024, and about 1M multiply-adds.",
}

TOTALS = (
    "The paper leaves biases out and K is 1024; 'differs' holds our weights against its parameters. Its column of "
    "operations adds up to the budget of 1.5 billion; ours is over it because of the 7x7 convolution of the first row "
    "(with --stem separable it fits: 1,498.7M)."
)

FEWER = (
    "The paper claims 12 times fewer parameters than AlexNet (section 1). No count of the network that Table 1 "
    "describes gives that: all parameters give 60,965,224 / 6,998,552 = 8.7, the table's own column (6,797.7K) 9.0 "
    "with K = 1000 and 8.8 with K = 1024, leaving out GoogLeNet's linear layer (5,973,552) 10.2. Its authors "
    "later speak of 5 million against 60 million (arXiv 1512.00567, section 1), which is where 12 comes from."
)
