variable "region" {
  description = "AWS region of the bucket."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region: give one such as eu-central-1."
  }
}

variable "bucket" {
  description = "Name of the bucket for data, runs and MLflow's artifacts; unique in all of AWS."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.bucket))
    error_message = "bucket: 3 to 63 of a-z, 0-9 and -, neither first nor last a -; no dots, which break TLS."
  }
}

variable "name" {
  description = "Beginning of the names of roles and profiles."
  type        = string
  default     = "googlenet-orchestrator"

  validation {
    condition     = can(regex("^[A-Za-z0-9+=,.@_-]{1,48}$", var.name))
    error_message = "name: 1 to 48 of the letters that IAM allows."
  }
}

variable "data_prefix" {
  description = "Where datasets lie: --data s3://BUCKET/PREFIX/NAME."
  type        = string
  default     = "data"

  validation {
    condition     = can(regex("^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$", var.data_prefix))
    error_message = "data_prefix: folders joined by /, without one at either end."
  }
}

variable "runs_prefix" {
  description = "Where runs go: --storage s3://BUCKET/PREFIX."
  type        = string
  default     = "runs"

  validation {
    condition     = can(regex("^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$", var.runs_prefix))
    error_message = "runs_prefix: folders joined by /, without one at either end."
  }

  validation {
    condition     = !startswith("${var.runs_prefix}/", "${var.data_prefix}/") && !startswith("${var.data_prefix}/", "${var.runs_prefix}/")
    error_message = "runs_prefix: must not lie in data_prefix, nor the other way round: nodes may write only one of them."
  }
}

variable "mlflow_prefix" {
  description = "Where the MLflow server keeps artifacts: MLFLOW_ARTIFACTS_DESTINATION=s3://BUCKET/PREFIX."
  type        = string
  default     = "mlflow"

  validation {
    condition     = can(regex("^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$", var.mlflow_prefix))
    error_message = "mlflow_prefix: folders joined by /, without one at either end."
  }

  validation {
    condition = alltrue([
      for other in [var.data_prefix, var.runs_prefix] :
      !startswith("${var.mlflow_prefix}/", "${other}/") && !startswith("${other}/", "${var.mlflow_prefix}/")
    ])
    error_message = "mlflow_prefix: must not lie in data_prefix or runs_prefix, nor the other way round."
  }
}

variable "nodes_may_pack" {
  description = "Whether nodes may also write datasets: jobs/shards.py pack, submitted to the cluster."
  type        = bool
  default     = false
}

variable "cluster_name" {
  description = "cluster_name of cluster/aws/cluster.yaml: the head may launch and end machines of that cluster alone."
  type        = string
  default     = "googlenet"
}

variable "oidc_provider_arn" {
  description = "The IAM OIDC provider of an EKS cluster, to make the role `pods`; null: no such role."
  type        = string
  default     = null

  validation {
    condition     = var.oidc_provider_arn == null || can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:oidc-provider/.+$", var.oidc_provider_arn))
    error_message = "oidc_provider_arn: null or arn:aws:iam::ACCOUNT:oidc-provider/oidc.eks.REGION.amazonaws.com/id/ID."
  }
}

variable "service_account" {
  description = "NAMESPACE:NAME of the service account that takes the role `pods`: that of cluster/kubernetes."
  type        = string
  default     = "googlenet:googlenet"

  validation {
    condition     = can(regex("^[a-z0-9-]+:[a-z0-9.-]+$", var.service_account))
    error_message = "service_account: NAMESPACE:NAME; no wildcards."
  }
}

variable "multipart_days" {
  description = "Days after which an unfinished upload in parts is removed."
  type        = number
  default     = 3

  validation {
    condition     = var.multipart_days >= 1 && floor(var.multipart_days) == var.multipart_days
    error_message = "multipart_days: a whole number of at least 1."
  }
}

variable "noncurrent_days" {
  description = "Days for which what was overwritten or deleted can be brought back."
  type        = number
  default     = 7

  validation {
    condition     = var.noncurrent_days >= 1 && floor(var.noncurrent_days) == var.noncurrent_days
    error_message = "noncurrent_days: a whole number of at least 1."
  }
}

variable "archive_runs_days" {
  description = "Age in days at which objects of runs move to the cheaper class for rare access; null: never."
  type        = number
  default     = null

  validation {
    condition     = var.archive_runs_days == null || try(var.archive_runs_days >= 30, false)
    error_message = "archive_runs_days: null, or at least 30, which is S3's own least age."
  }
}

variable "kms_key_arn" {
  description = "A KMS key to encrypt with; null: S3's own keys (SSE-S3)."
  type        = string
  default     = null

  validation {
    condition     = var.kms_key_arn == null || can(regex("^arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:key/.+$", var.kms_key_arn))
    error_message = "kms_key_arn: null or arn:aws:kms:REGION:ACCOUNT:key/ID."
  }
}

variable "copy_region" {
  description = "Another region, where S3 keeps a copy of all runs in BUCKET-copy; null: no copy."
  type        = string
  default     = null

  validation {
    condition     = var.copy_region == null || try(can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.copy_region)) && var.copy_region != var.region, false)
    error_message = "copy_region: null, or another one than region, such as eu-west-1."
  }

  validation {
    condition     = var.copy_region == null || length(var.bucket) <= 58
    error_message = "copy_region: the copy is called BUCKET-copy, so bucket may have 58 letters at most."
  }
}

variable "copy_noncurrent_days" {
  description = "Days for which what was overwritten or deleted can be brought back from the copy."
  type        = number
  default     = 30

  validation {
    condition     = var.copy_noncurrent_days >= 1 && floor(var.copy_noncurrent_days) == var.copy_noncurrent_days
    error_message = "copy_noncurrent_days: a whole number of at least 1."
  }
}

variable "copy_kms_key_arn" {
  description = "A KMS key of copy_region to encrypt the copy with; null: S3's own keys. Needed where kms_key_arn is given."
  type        = string
  default     = null

  validation {
    condition     = var.copy_kms_key_arn == null || can(regex("^arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:key/.+$", var.copy_kms_key_arn))
    error_message = "copy_kms_key_arn: null or arn:aws:kms:REGION:ACCOUNT:key/ID."
  }

  validation {
    condition     = var.copy_region == null || (var.kms_key_arn == null) == (var.copy_kms_key_arn == null)
    error_message = "copy_kms_key_arn: a copy is encrypted as the bucket is: give both keys or none."
  }
}

variable "force_destroy" {
  description = "Whether `terraform destroy` may delete a bucket that is not empty."
  type        = bool
  default     = false
}

variable "tags" {
  description = "Tags of everything."
  type        = map(string)
  default     = { project = "googlenet-orchestrator" }
}
