output "data" {
  description = "For --data, followed by /NAME."
  value       = "s3://${aws_s3_bucket.this.id}/${var.data_prefix}"
}

output "storage" {
  description = "For --storage."
  value       = "s3://${aws_s3_bucket.this.id}/${var.runs_prefix}"
}

output "mlflow_artifacts" {
  description = "For MLFLOW_ARTIFACTS_DESTINATION."
  value       = "s3://${aws_s3_bucket.this.id}/${var.mlflow_prefix}"
}

output "instance_profiles" {
  description = "ARNs of the instance profiles, by who has them: nodes, head, mlflow."
  value       = { for name, profile in aws_iam_instance_profile.this : name => profile.arn }
}

output "role_arns" {
  description = "ARNs of the roles: of `pods`, for the annotation in cluster/kubernetes/overlays/large/serviceaccount.yaml."
  value       = { for name, role in aws_iam_role.this : name => role.arn }
}
