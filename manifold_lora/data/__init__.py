"""From a file of records to batches of tokens, one module per step.

Reading order: `records` (file to records), `tokens` and `chats` (records to token ids
and loss masks), `batches` (examples to batches of one shape), `preview` (prints a
batch); `builtin` is a data set that needs no file. Nothing is imported here, so that
importing `manifold_lora.data.records` does not import a tokenizer.
"""
