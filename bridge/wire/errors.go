package wire

import "errors"

// Errors that callers branch on.
var (
	// ErrVersion: the bytes were written by a newer holdfast; they are not damaged.
	ErrVersion = errors.New("written by a newer holdfast: update this program")
	// ErrFormat: the bytes are not what they should be.
	ErrFormat = errors.New("not in the expected format")
)
