"""What `meshq submit` does before it talks to the agent: source, requirements and description of a task."""
