package devices

import "errors"

// Errors of Link.Send.
var (
	ErrGone           = errors.New("connection has ended")
	ErrPacketTooLarge = errors.New("larger than the device's maximum packet size")
)
