"""The walk as values and functions: no Kafka, no clock, no environment."""
