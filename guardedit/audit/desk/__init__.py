"""MLflow as the reviewers' desk: what a person reads there, the queue, saved views, registered versions, roles."""
