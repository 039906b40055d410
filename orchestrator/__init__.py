"""A distributed training orchestrator that reproduces GoogLeNet / ILSVRC-2014 (arXiv 1409.4842)."""
