"""Data of the experiments, one file a task: dataset, tokenizer and metric together."""
