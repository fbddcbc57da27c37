#!/bin/sh
# Makes an authority, a server's certificate and a worker's, in a folder; what is there already stays. For a trial: in
# earnest certificates come from an authority of yours, and the authority's key is not where the server is.
set -eu
folder=${1:?usage: make-certificates.sh FOLDER}
days=825
cd "$folder"
[ -s worker.pem ] && exit 0

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days "$days" \
    -subj "/CN=optimd trial authority" \
    -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout ca.key -out ca.pem

issue() {
    name=$1 names=$2 usage=$3
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$name" -keyout "$name.key" -out "$name.csr"
    printf 'subjectAltName=%s\nextendedKeyUsage=%s\n' "$names" "$usage" > "$name.ext"
    openssl x509 -req -in "$name.csr" -CA ca.pem -CAkey ca.key -CAcreateserial -days "$days" -extfile "$name.ext" -out "$name.new"
    rm "$name.csr" "$name.ext"
    mv "$name.new" "$name.pem"
}

issue server "DNS:server,DNS:localhost,IP:127.0.0.1" serverAuth
issue worker "DNS:worker" clientAuth
# The containers' user reads them; the authority's key nobody needs any more.
rm ca.key
chmod 0444 ./*.pem ./*.key
