"""Brokers that ask who one is: TLS, logins, permissions, and that no secret is shown."""
