# Login shells of a workspace (/etc/profile.d). /etc/profile has just set PATH anew.
PATH="$HOME/.local/bin:$PATH"
export PATH

# `npm install -g` goes beside what `pip install` brings: the rest of the image is not the user's to write.
export NPM_CONFIG_PREFIX="$HOME/.local"

# Python and Node packages bring root certificates of their own. The system's list holds the same ones and also those
# that the operator added, for instance for a proxy that inspects TLS.
export PIP_CERT=/etc/ssl/certs/ca-certificates.crt
export REQUESTS_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt
export NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt

export PIP_DISABLE_PIP_VERSION_CHECK=1
export NPM_CONFIG_UPDATE_NOTIFIER=false
