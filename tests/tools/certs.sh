#!/bin/sh
# Makes the keys and certificates that the TLS tests use, good ones and bad ones, into a directory.
#
#   sh tests/tools/certs.sh DIRECTORY

set -e
command -v openssl >/dev/null || { echo "no openssl here" >&2; exit 77; }
mkdir -p "$1" && cd "$1"
rm -f ./*
exec 2>log
umask 077

ec_key() { openssl ecparam -genkey -name "$2" -noout -out "$1.key"; }

root() { # NAME COMMON-NAME: an authority
    ec_key "$1" prime256v1
    openssl req -x509 -new -key "$1.key" -sha256 -days 7300 -subj "/CN=$2" -out "$1.pem" \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign
}

serial=1000
issue() { # NAME COMMON-NAME ISSUER EXTENSIONS [DAYS]: for the key NAME.key
    serial=$((serial + 1))
    printf '%b' "$4" >ext
    openssl req -new -key "$1.key" -subj "/CN=$2" -out csr
    openssl x509 -req -in csr -CA "$3.pem" -CAkey "$3.key" -set_serial $serial -sha256 \
        -extfile ext -out "$1.pem" -days "${5:-7200}"
}

server='extendedKeyUsage=serverAuth\nsubjectAltName='
client='extendedKeyUsage=clientAuth\nsubjectAltName='

root ca "Test authority"
root other-ca "Another authority"

ec_key ec prime256v1
issue ec localhost ca "${server}DNS:localhost,DNS:a.test,IP:127.0.0.1,IP:::1"
openssl genrsa -out rsa.key 2048
issue rsa b.test ca "${server}DNS:b.test,DNS:*.wild.test"
ec_key p384 secp384r1
issue p384 c.test ca "${server}DNS:c.test"
ec_key p521 secp521r1
issue p521 d.test ca "${server}DNS:d.test"
openssl genrsa -out rsa4096.key 4096
issue rsa4096 e.test ca "${server}DNS:e.test"
ec_key plain prime256v1
issue plain plain.test ca 'keyUsage=digitalSignature'
ec_key rsa-fallback prime256v1
issue rsa-fallback b.test ca "${server}DNS:b.test"

ec_key alice prime256v1
issue alice alice ca "${client}DNS:alice.test"
openssl genrsa -out bob.key 2048
issue bob bob ca "$client"email:bob@example.org
ec_key stray prime256v1
openssl req -x509 -new -key stray.key -sha256 -days 7200 -subj /CN=stray -out stray.pem
ec_key foreign prime256v1
issue foreign foreign other-ca "${client}DNS:foreign.test"

# For every purpose.
ec_key any.test prime256v1
issue any.test any.test ca 'extendedKeyUsage=anyExtendedKeyUsage\nsubjectAltName=DNS:any.test'

# Issued by one that is no authority.
ec_key minor prime256v1
issue minor minor.test ec "${server}DNS:minor.test"
cat minor.pem ec.pem >minor-chain.pem

# An authority between, and its leaf; the chain in order, out of order, and without it.
ec_key middle prime256v1
issue middle "Middle authority" ca 'basicConstraints=critical,CA:TRUE\nkeyUsage=keyCertSign'
ec_key deep prime256v1
issue deep deep.test middle "${server}DNS:deep.test,DNS:localhost"
cat deep.pem middle.pem >chain.pem
cat middle.pem deep.pem >disorder.pem

ec_key expired prime256v1
issue expired localhost ca "${server}DNS:localhost" -1

openssl genrsa -out rsa1024.key 1024
issue rsa1024 small.test ca "${server}DNS:small.test"
openssl genpkey -algorithm ed25519 -out ed25519.key
issue ed25519 ed.test ca "${server}DNS:ed.test"
ec_key k1 secp256k1
issue k1 k1.test ca "${server}DNS:k1.test"
# Three primes, since two such large ones take long.
openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:4224 -pkeyopt rsa_keygen_primes:3 \
    -out rsa4224.key
issue rsa4224 large.test ca "${server}DNS:large.test"

# Other spellings of a key.
openssl pkcs8 -topk8 -nocrypt -in ec.key -out ec-pkcs8.key
openssl pkcs8 -topk8 -nocrypt -in rsa.key -out rsa-pkcs8.key
openssl rsa -in rsa.key -traditional -out rsa-pkcs1.key
openssl ecparam -name prime256v1 -out params && cat params ec.key >ec-params.key
cat ec.pem ec.key >both.pem

# Bad files.
openssl pkcs8 -topk8 -in ec.key -passout pass:secret -out encrypted.key
openssl ec -in ec.key -aes128 -passout pass:secret -out legacy.key
: >empty.pem
echo 'no certificate here' >text.pem
sed '3s/./!/' ec.pem >garbage.pem
sed '$d' ec.pem >cut.pem
openssl x509 -in ec.pem -outform DER -out ec.der
openssl ec -in ec.key -outform DER -out ec-key.der
{ echo '-----BEGIN CERTIFICATE-----'; echo 'aGVsbG8='; echo '-----END CERTIFICATE-----'; } >hello.pem
cp ec.key open.key && chmod 644 open.key
rm -f csr ext params
echo done >done
