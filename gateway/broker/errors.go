package broker

import (
	"errors"
	"net"

	"holdfast/internal/mqtt"
)

// ErrQuota in the error of an Intake says that the message was refused because something is
// full. An MQTT 5 client is told 0x97, quota exceeded, instead of 0x80, unspecified error.
var ErrQuota = errors.New("quota exceeded")

// Errors for Authorizer.Connect to wrap: they choose what CONNACK says. Any other error is
// answered as ErrNotAuthorized.
var (
	ErrBadCredentials = errors.New("bad user name or password") // MQTT 5: 0x86; 3.1.1: return code 4
	ErrNotAuthorized  = errors.New("not authorized")            // 0x87; 5
	ErrBadClientID    = errors.New("client id not valid")       // 0x85; 2
	ErrUnavailable    = errors.New("service unavailable")       // 0x88; 3
	ErrTooOften       = errors.New("connects too often")        // 0x9F; 3
)

// What ends a connection besides the peer's own doing. None of them leaves the package.
var (
	errStopping  = errors.New("gateway is shutting down")
	errEnded     = errors.New("connection is closed")
	errGoodbye   = errors.New("client disconnected")
	errNoWords   = errors.New("refused a publish, which MQTT 3.1.1 cannot say")
	errCommit    = errors.New("commit did not succeed")
	errSlow      = errors.New("peer does not read what it is sent")
	errHungUp    = errors.New("peer hung up while its handshake waited")
	errTakenOver = errors.New("another connection took the session over")
	errOverRate  = &refusal{mqtt.MessageRateTooHigh, "went on publishing more than it may"}
)

// refusal is an error with the reason that the peer is told.
type refusal struct {
	reason mqtt.Reason
	text   string
}

func (r *refusal) Error() string { return r.text + ": " + r.reason.String() }

// ordered is an end that the gateway wants, with what an MQTT 5 client is told.
type ordered struct {
	reason mqtt.Reason
	text   string
}

func (o *ordered) Error() string { return o.text }

// causeText says for people why a connection has ended.
func causeText(err error) string {
	var refused *refusal
	switch {
	case errors.As(err, &refused):
		return refused.text
	case err == nil, errors.Is(err, errEnded):
		return errEnded.Error()
	case isEOF(err), isReset(err), isSilent(err), errors.Is(err, net.ErrClosed):
		return "connection was lost"
	}
	return err.Error()
}

// reasonOf gives the reason for which err ends a connection; told is false if the peer is
// told nothing.
func reasonOf(err error) (reason mqtt.Reason, told bool) {
	var (
		broken  *mqtt.Error
		refused *refusal
		wanted  *ordered
	)
	switch {
	case errors.As(err, &wanted):
		return wanted.reason, true
	case errors.As(err, &broken):
		return broken.Reason, true
	case errors.As(err, &refused):
		return refused.reason, true
	case errors.Is(err, errStopping):
		return mqtt.ServerShuttingDown, true
	case errors.Is(err, errTakenOver):
		return mqtt.SessionTakenOver, true
	}
	return 0, false
}

// connectReason gives the CONNACK reason for an error of Authorizer.Connect.
func connectReason(err error) mqtt.Reason {
	switch {
	case errors.Is(err, ErrBadCredentials):
		return mqtt.BadUsernameOrPassword
	case errors.Is(err, ErrBadClientID):
		return mqtt.ClientIDNotValid
	case errors.Is(err, ErrUnavailable):
		return mqtt.ServerUnavailable
	case errors.Is(err, ErrTooOften):
		return mqtt.ConnectionRateExceeded
	}
	return mqtt.NotAuthorized
}
