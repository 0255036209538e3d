"""Methods × seeds × settings: tuning, the processes that run them, and the specifications of published tables."""
