"""`bench judge`: models that were finetuned elsewhere, measured like a run of this suite."""
