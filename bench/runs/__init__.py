"""One run: planned, checked, trained, evaluated, written; and its finished folder, sampled or evaluated again."""
