# What applications are built on and run in: Python, Node and a static file server, and an unprivileged user.
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates caddy curl git nodejs npm python3 python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*

# pip and npm carry lists of their own: an authority that the operator added to the base image has to count here too.
ENV LANG=C.UTF-8 \
    NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt \
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    npm_config_audit=false \
    npm_config_fund=false \
    npm_config_update_notifier=false

COPY Caddyfile /etc/code-sessions/Caddyfile

RUN useradd --uid 10001 --user-group --create-home --home-dir /app --shell /usr/sbin/nologin app
USER app
WORKDIR /app
