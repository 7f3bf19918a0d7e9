package wire

// Seams for tests in wire_test.
var (
	EscapeLevel          = escapeLevel
	UnescapeLevel        = unescapeLevel
	NewBatchEncoderLevel = newBatchEncoder
	SubmitKeys           = submitKeys
)
