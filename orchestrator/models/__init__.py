"""Networks as data and modules: GoogLeNet of Table 1, its cost, its ablations."""
