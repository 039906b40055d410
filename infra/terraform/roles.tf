# Roles: `nodes` of the Ray cluster on EC2, its `head` (which also launches machines: autoscaler.tf), `pods` of the one on
# EKS, and the MLflow server. The last sees nothing of the others', nor they of its.

locals {
  of_jobs = {
    read  = [var.data_prefix, var.runs_prefix]
    write = concat([var.runs_prefix], var.nodes_may_pack ? [var.data_prefix] : [])
  }

  # What each role may read and write, as prefixes of the bucket.
  of_machines = {
    nodes = local.of_jobs
    head  = local.of_jobs
    mlflow = {
      read  = [var.mlflow_prefix]
      write = [var.mlflow_prefix]
    }
  }
  of_pods = { for name in ["pods"] : name => local.of_jobs if var.oidc_provider_arn != null }
  access  = merge(local.of_machines, local.of_pods)
}

# Who takes a role: machines by their instance profile, pods by the token of their service account.
data "aws_iam_policy_document" "machine" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "pods" {
  for_each = local.of_pods

  statement {
    actions = ["sts:AssumeRoleWithWebIdentity"]

    principals {
      type        = "Federated"
      identifiers = [var.oidc_provider_arn]
    }

    # Of one service account alone: the provider speaks for every pod of the cluster.
    condition {
      test     = "StringEquals"
      variable = "${split(":oidc-provider/", var.oidc_provider_arn)[1]}:sub"
      values   = ["system:serviceaccount:${var.service_account}"]
    }

    condition {
      test     = "StringEquals"
      variable = "${split(":oidc-provider/", var.oidc_provider_arn)[1]}:aud"
      values   = ["sts.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "access" {
  for_each = local.access

  statement {
    sid       = "List"
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.this.arn]

    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = flatten([for prefix in each.value.read : [prefix, "${prefix}/*"]])
    }
  }

  statement {
    sid       = "Read"
    actions   = ["s3:GetObject"]
    resources = [for prefix in each.value.read : "${aws_s3_bucket.this.arn}/${prefix}/*"]
  }

  # Deleting leaves a version that can be brought back; deleting versions is not for machines.
  statement {
    sid       = "Write"
    actions   = ["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    resources = [for prefix in each.value.write : "${aws_s3_bucket.this.arn}/${prefix}/*"]
  }

  dynamic "statement" {
    for_each = var.kms_key_arn == null ? [] : [var.kms_key_arn]

    content {
      sid       = "Key"
      actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
      resources = [statement.value]

      # For this bucket's objects, not for whatever else the key protects.
      condition {
        test     = "StringLike"
        variable = "kms:EncryptionContext:aws:s3:arn"
        values   = ["${aws_s3_bucket.this.arn}*"]
      }
    }
  }
}

resource "aws_iam_role" "this" {
  for_each = local.access

  name = "${var.name}-${each.key}"
  assume_role_policy = (
    each.key == "pods" ? data.aws_iam_policy_document.pods[each.key].json : data.aws_iam_policy_document.machine.json
  )
}

resource "aws_iam_role_policy" "this" {
  for_each = local.access

  name   = "bucket"
  role   = aws_iam_role.this[each.key].id
  policy = data.aws_iam_policy_document.access[each.key].json
}

resource "aws_iam_instance_profile" "this" {
  for_each = local.of_machines

  name = "${var.name}-${each.key}"
  role = aws_iam_role.this[each.key].name
}
