"""From a file of records to batches of tokens, one module per step.

Reading order: `records` (a file to records), `tokens` (records to token ids with
the answers marked), `batches` (examples to arrays of one shape), `preview` (a batch
on the screen); `builtin` is a data set that needs no file. Nothing is imported
here, so that `manifold_lora.data.records` does not wait for a tokenizer.
"""
