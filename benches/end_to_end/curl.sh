#!/usr/bin/env bash
# The vendor's example in a loop: one curl for each image of the directories. Waits for the end of its input when it is done,
# so that what it used can be read.
set -euo pipefail

url=$1
shift
json='Content-Type: application/json'
login='{"username":"framegate","password":"simulated"}'
token=$(curl -sSf -H "$json" -d "$login" "$url/api/v1/authenticate" | sed 's/.*"token":"\([^"]*\)".*/\1/')
for directory in "$@"; do
    for file in "$directory"/*; do
        {
            printf '{"expanded":"'
            base64 -w0 "$file"
            printf '","detectorName":"%s","ianaTimeZone":"UTC","detectTimeUtc":"%s"}' \
                "${directory##*/}" "$(date -u +%FT%T.%3NZ)"
        } | curl -sSf -H "Authorization: Bearer $token" -H "$json" --data-binary @- "$url/api/v1/faceEdge/publish"
        rm "$file"
    done
done
read -r _ || true
