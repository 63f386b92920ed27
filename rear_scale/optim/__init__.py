"""What follows the gradients: rules, schedules, backends."""
