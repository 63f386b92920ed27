"""The training loop with its checks, guards, validation and telemetry."""
