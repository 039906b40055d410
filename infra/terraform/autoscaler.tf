# What Ray's autoscaler does on the head of cluster/aws: it launches workers with the role `nodes`, tags them and ends them.

data "aws_caller_identity" "this" {}

data "aws_partition" "this" {}

locals {
  ec2 = "arn:${data.aws_partition.this.partition}:ec2:${var.region}:${data.aws_caller_identity.this.account_id}"
}

data "aws_iam_policy_document" "autoscaler" {
  # EC2 knows no narrower resources for these.
  statement {
    sid       = "Look"
    actions   = ["ec2:Describe*"]
    resources = ["*"]
  }

  # Only with the cluster's name on it, which Ray gives to each machine as it asks for it.
  statement {
    sid       = "Launch"
    actions   = ["ec2:RunInstances"]
    resources = ["${local.ec2}:instance/*"]

    condition {
      test     = "StringEquals"
      variable = "aws:RequestTag/ray-cluster-name"
      values   = [var.cluster_name]
    }
  }

  # What a machine is launched from and with; these carry no tag of Ray's. Images belong to their publisher.
  statement {
    sid     = "LaunchWith"
    actions = ["ec2:RunInstances"]
    resources = concat(
      ["arn:${data.aws_partition.this.partition}:ec2:${var.region}::image/*"],
      [for kind in ["key-pair", "network-interface", "security-group", "subnet", "volume"] : "${local.ec2}:${kind}/*"],
    )
  }

  statement {
    sid       = "TagNew"
    actions   = ["ec2:CreateTags"]
    resources = ["${local.ec2}:instance/*"]

    condition {
      test     = "StringEquals"
      variable = "ec2:CreateAction"
      values   = ["RunInstances"]
    }
  }

  # Ray writes each machine's state into its tags. Other clusters' machines are neither tagged nor ended.
  statement {
    sid       = "TagAndEnd"
    actions   = ["ec2:CreateTags", "ec2:TerminateInstances"]
    resources = ["${local.ec2}:instance/*"]

    condition {
      test     = "StringEquals"
      variable = "aws:ResourceTag/ray-cluster-name"
      values   = [var.cluster_name]
    }
  }

  # Else an intruder on the head could launch a machine with any role of the account.
  statement {
    sid       = "PassTheWorkersRole"
    actions   = ["iam:PassRole"]
    resources = [aws_iam_role.this["nodes"].arn]

    condition {
      test     = "StringEquals"
      variable = "iam:PassedToService"
      values   = ["ec2.amazonaws.com"]
    }
  }

  # The images of cluster/aws/cluster.yaml are names that AWS publishes: resolve:ssm:/aws/service/...
  statement {
    sid       = "NamesOfImages"
    actions   = ["ssm:GetParameters"]
    resources = ["arn:${data.aws_partition.this.partition}:ssm:${var.region}::parameter/aws/service/*"]
  }
}

resource "aws_iam_role_policy" "autoscaler" {
  name   = "autoscaler"
  role   = aws_iam_role.this["head"].id
  policy = data.aws_iam_policy_document.autoscaler.json
}
