"""Apache Kafka for tests: real brokers, as plain JVM processes."""
