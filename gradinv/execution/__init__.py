"""How an evaluation is run: eager, traced, as a CUDA graph; alone or across processes."""
