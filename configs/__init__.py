"""Complete, launchable YAML configs."""
