"""What turns gradients into steps: row optimizers, backbone parameter groups, one clip norm, schedules, averages."""
