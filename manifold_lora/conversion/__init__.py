"""Converting models and adapters: merge, export, import and convert."""
