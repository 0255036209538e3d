"""What the commands of `bench.cli` do."""
