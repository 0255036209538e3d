"""What generates: one file a family, behind the verbs of `DiffusionModel`; `catalogue` finds a model by name."""
