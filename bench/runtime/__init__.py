"""The ground floor: memory, accounting, processes, signals, files. Imports nothing of the project but its errors."""
