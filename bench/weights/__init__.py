"""What does not ship: hub files, random stand-ins, and what a setting needs."""
