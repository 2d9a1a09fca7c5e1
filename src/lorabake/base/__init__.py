"""The ground floor: errors, cards, events, units, random streams and safe files. Standard library and pydantic only."""
