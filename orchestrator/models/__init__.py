"""Networks as data and modules: GoogLeNet of Table 1 and its ablations, those before it, and what they cost."""
