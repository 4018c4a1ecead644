"""Growing language models: dense to mixture of experts and back, and the folders that hold what no class of transformers does."""
