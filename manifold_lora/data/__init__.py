"""From files of records to batches of tokens, one module per step.

Reading order: `files` (files to JSON values), `formats` and `messages` (values to
records, which `schema` defines), `records` (all of that), `templates` and `chats`
(chats to texts with the spans of their answers), `masks` (texts to token ids and
masks), `tokens` (all of that: records to examples), `batches` (examples to batches),
`preview` (prints a batch); `builtin` is a data set that needs no file. Nothing is
imported here, so that importing `manifold_lora.data.records` does not import a
tokenizer.
"""
