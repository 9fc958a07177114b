"""The control plane: sessions, terminals, keys and deployments behind a REST API."""
