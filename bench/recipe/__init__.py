"""How the embedded prior was made. No run imports this."""
