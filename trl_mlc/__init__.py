"""Multi-Lingual Consistency trainers for TRL."""
