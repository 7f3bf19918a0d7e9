package devices

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Limits of what is told about a device.
const (
	MaxDeviceID       = 128 // bytes
	MaxDeviceName     = 128 // characters
	MaxLabels         = 32
	MaxLabelKey       = 64  // bytes
	MaxLabelValue     = 256 // bytes
	MaxCredentials    = 10  // of one device
	MinPassword       = 12  // characters
	MaxPassword       = 256 // bytes
	maxDevices        = 1_000_000
	maxAnonymous      = 10_000 // devices that registered themselves
	brokerIDPrefix    = "hf-"  // client ids that the broker made: nobody comes back under one
	idAlphabetForHelp = "letters, digits and - _ . : @"
)

// CheckID says by which rule id is no device id, in an error that wraps ErrBadID. A device id is 1 to 128 letters
// (a to z, in both cases), digits, '-', '_', '.', ':' and '@', and begins with a letter or a digit: it stands in topics,
// URLs, file names and log lines as it is.
func CheckID(id string) error {
	switch {
	case id == "":
		return fmt.Errorf("%w: it is empty", ErrBadID)
	case len(id) > MaxDeviceID:
		return fmt.Errorf("%w: it has %d bytes, at most %d are allowed", ErrBadID, len(id), MaxDeviceID)
	}
	for i := range len(id) {
		switch c := id[i]; {
		case alphanumeric(c):
		case i == 0 && strings.IndexByte("-_.:@", c) >= 0:
			return fmt.Errorf("%w: %q begins with %q, it has to begin with a letter or a digit", ErrBadID, id, c)
		case strings.IndexByte("-_.:@", c) < 0:
			r, _ := utf8.DecodeRuneInString(id[i:])
			return fmt.Errorf("%w: %q has %q in it, only %s are allowed", ErrBadID, id, r, idAlphabetForHelp)
		}
	}
	return nil
}

func alphanumeric(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

func checkName(name string) error {
	switch n := utf8.RuneCountInString(name); {
	case n > MaxDeviceName:
		return fmt.Errorf("%w: the name has %d characters, at most %d are allowed", ErrInvalid, n, MaxDeviceName)
	case !printable(name):
		return fmt.Errorf("%w: the name %q has characters that cannot be printed", ErrInvalid, name)
	}
	return nil
}

func checkLabels(labels map[string]string) error {
	if len(labels) > MaxLabels {
		return fmt.Errorf("%w: %d labels, at most %d are allowed", ErrInvalid, len(labels), MaxLabels)
	}
	for k, v := range labels {
		switch {
		case k == "":
			return fmt.Errorf("%w: a label without a key", ErrInvalid)
		case len(k) > MaxLabelKey:
			return fmt.Errorf("%w: the label key %q has %d bytes, at most %d are allowed", ErrInvalid, k, len(k), MaxLabelKey)
		case !printable(k) || strings.ContainsAny(k, "= "):
			return fmt.Errorf("%w: the label key %q may have no '=', no space and only characters that can be printed", ErrInvalid, k)
		case len(v) > MaxLabelValue:
			return fmt.Errorf("%w: the label %s has %d bytes, at most %d are allowed", ErrInvalid, k, len(v), MaxLabelValue)
		case !printable(v):
			return fmt.Errorf("%w: the label %s has characters that cannot be printed", ErrInvalid, k)
		}
	}
	return nil
}

func printable(s string) bool {
	if !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}
