package devices

import "errors"

// Errors of the Registry. Texts of wrapped errors name the way out.
var (
	ErrUnknownDevice  = errors.New("no such device")
	ErrDeviceExists   = errors.New("device exists already")
	ErrBadID          = errors.New("not a device id")
	ErrInvalid        = errors.New("not valid")
	ErrCredentials    = errors.New("credentials not accepted") // of Authenticate, for an unknown device too: the same answer in the same time
	ErrDisabled       = errors.New("device is disabled")
	ErrNoCredential   = errors.New("no such credential")
	ErrTooManyDevices = errors.New("too many devices")
	ErrTooOften       = errors.New("too many attempts") // not an answer to what was shown: it was not looked at, or the device connects too often
	// ErrVersion is about a row that is left alone: its device or command can therefore not be used.
	ErrVersion = errors.New("written by a newer holdfast: install that version again")
)

// ErrAnswer is wrapped by the errors of Queue.Answer that mean: refused and counted, never believed.
// What is wrong follows it.
var ErrAnswer = errors.New("answer not believed")

// Errors of Link.Send.
var (
	ErrGone           = errors.New("connection has ended")
	ErrPacketTooLarge = errors.New("larger than the device's maximum packet size")
)

// errDamaged is wrapped by what is said of a row that cannot be read.
var errDamaged = errors.New("row is damaged")
