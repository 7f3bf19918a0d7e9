package httpapi

import (
	"mime"
	"strings"
	"unicode/utf8"

	"holdfast/bridge/wire"
)

// Bounds of what is shown of one message, bytes.
const (
	shownPayload = 4 << 10
	readableCBOR = 64 << 10 // larger CBOR is not taken apart
)

// content shows a payload, of which it keeps nothing. kind is its content type, "" if the device gave none.
func content(payload []byte, kind string) Content {
	c := Content{ContentType: kind, Size: len(payload)}
	c.PayloadCBOR, c.Truncated = diagnose(payload, kind)
	p := payload
	if len(p) > shownPayload {
		c.Truncated = true
		p = p[:shownPayload]
		if isText(payload) { // not in the middle of a letter
			for len(p) > 0 && !utf8.RuneStart(payload[len(p)]) {
				p = p[:len(p)-1]
			}
		}
	}
	if p == nil {
		p = []byte{}
	}
	c.Payload, c.PayloadBase64 = textOrBase64(p)
	return c
}

// diagnose writes CBOR in diagnostic notation, as far as shownPayload goes; "": it is none.
func diagnose(b []byte, kind string) (text string, cut bool) {
	if len(b) == 0 || len(b) > readableCBOR {
		return "", false
	}
	media, _, _ := mime.ParseMediaType(kind) // what is no media type is ""
	told := media == typeCBOR || strings.HasSuffix(media, "+cbor")
	list := b[0] >= 0x80 && b[0] < 0xc0 // an array or a map (RFC 8949 §3.1)
	if !told && (!list || isText(b)) {
		return "", false
	}
	text, err := wire.Diagnose(b)
	if err != nil {
		return "", false
	}
	if len(text) > shownPayload {
		text = strings.ToValidUTF8(text[:shownPayload], "")
		cut = true
	}
	return text, cut
}
