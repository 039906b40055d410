# A second bucket in another region that S3 itself keeps like the runs of the first, made when copy_region is given. Data
# packs again to the same bytes, and MLflow's plots are in the runs' folders: neither is copied.

locals {
  copies = var.copy_region == null ? 0 : 1
}

resource "aws_s3_bucket" "copy" {
  count = local.copies

  region        = var.copy_region
  bucket        = "${var.bucket}-copy"
  force_destroy = var.force_destroy
}

resource "aws_s3_bucket_ownership_controls" "copy" {
  count = local.copies

  region = var.copy_region
  bucket = aws_s3_bucket.copy[0].id

  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_public_access_block" "copy" {
  count = local.copies

  region                  = var.copy_region
  bucket                  = aws_s3_bucket.copy[0].id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

# Replication wants versions at both ends.
resource "aws_s3_bucket_versioning" "copy" {
  count = local.copies

  region = var.copy_region
  bucket = aws_s3_bucket.copy[0].id

  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "copy" {
  count = local.copies

  region = var.copy_region
  bucket = aws_s3_bucket.copy[0].id

  rule {
    bucket_key_enabled = var.copy_kms_key_arn != null

    apply_server_side_encryption_by_default {
      sse_algorithm     = var.copy_kms_key_arn == null ? "AES256" : "aws:kms"
      kms_master_key_id = var.copy_kms_key_arn
    }
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "copy" {
  count = local.copies

  region = var.copy_region
  bucket = aws_s3_bucket.copy[0].id

  depends_on = [aws_s3_bucket_versioning.copy]

  # What the first bucket lost by a mistake can be brought back from here for longer than there.
  rule {
    id     = "old-versions"
    status = "Enabled"

    filter {}

    noncurrent_version_expiration {
      noncurrent_days = var.copy_noncurrent_days
    }

    expiration {
      expired_object_delete_marker = true
    }
  }
}

resource "aws_s3_bucket_policy" "copy" {
  count = local.copies

  region = var.copy_region
  bucket = aws_s3_bucket.copy[0].id
  policy = data.aws_iam_policy_document.bucket["copy"].json

  depends_on = [aws_s3_bucket_public_access_block.copy]
}

resource "aws_s3_bucket_replication_configuration" "this" {
  count = local.copies

  bucket = aws_s3_bucket.this.id
  role   = aws_iam_role.copy[0].arn

  depends_on = [aws_s3_bucket_versioning.this, aws_s3_bucket_versioning.copy]

  rule {
    id     = "runs"
    status = "Enabled"

    filter {
      prefix = "${var.runs_prefix}/"
    }

    # A run deletes its old checkpoints: without this the copy would keep them all. S3 never copies that a version was
    # deleted, so an intruder in the first bucket cannot empty the second through it.
    delete_marker_replication {
      status = "Enabled"
    }

    dynamic "source_selection_criteria" {
      for_each = var.kms_key_arn == null ? [] : [true]

      content {
        sse_kms_encrypted_objects {
          status = "Enabled"
        }
      }
    }

    destination {
      bucket = aws_s3_bucket.copy[0].arn

      dynamic "encryption_configuration" {
        for_each = var.copy_kms_key_arn == null ? [] : [var.copy_kms_key_arn]

        content {
          replica_kms_key_id = encryption_configuration.value
        }
      }
    }
  }
}
