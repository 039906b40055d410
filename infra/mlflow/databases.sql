-- Roles and databases of the MLflow server, for `psql` as a superuser on a server that has none of them yet.
-- Passwords come from files in $SECRETS_DIRECTORY (/run/secrets), so they are on no command line.
\set ON_ERROR_STOP on
\set mlflow `cat "${SECRETS_DIRECTORY:-/run/secrets}/database_password"`
\set grafana `cat "${SECRETS_DIRECTORY:-/run/secrets}/grafana_database_password"`
-- An empty password would be none at all.
SELECT length(:'mlflow') >= 12 AND length(:'grafana') >= 12 AS given \gset
\if :given
\else
\warn 'databases.sql: error: database_password and grafana_database_password need at least 12 letters each'
\quit 3
\endif

SET password_encryption = 'scram-sha-256';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow';
-- Reads the curves for dashboards; prepare.py says which tables.
CREATE ROLE grafana LOGIN PASSWORD :'grafana' CONNECTION LIMIT 20;
ALTER ROLE grafana SET default_transaction_read_only = on;
ALTER ROLE grafana SET statement_timeout = '30s';

CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_auth OWNER mlflow;
-- By default everybody may connect to every database.
REVOKE CONNECT, TEMPORARY ON DATABASE mlflow, mlflow_auth FROM PUBLIC;
GRANT CONNECT ON DATABASE mlflow TO grafana;
