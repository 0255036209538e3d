"""Is all well here? Machine, plugins, speed, memory."""
