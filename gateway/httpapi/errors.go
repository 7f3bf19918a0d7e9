package httpapi

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"

	"holdfast/devices"
	"holdfast/spool"
)

// Error is how every refusal looks: {"error":{"code","message"}}.
type Error struct {
	Error ErrorBody `json:"error"`
}

// ErrorBody is the inside of an Error.
type ErrorBody struct {
	Code    string `json:"code"`    // for programs: stays
	Message string `json:"message"` // for people: may change
}

// failure is an error with the code that the caller is told. Its text is for people and names the way out.
type failure struct {
	code, message string
	retry         int // seconds after which it is worth another try; 0: nothing is said of that
}

func (f *failure) Error() string { return f.message }

func failf(code, format string, args ...any) *failure {
	return &failure{code: code, message: fmt.Sprintf(format, args...)}
}

// Codes of errors that are not of the package devices.
const (
	codeBadQuery        = "bad_query"
	codeBadBody         = "bad_body"
	codeInvalidDevice   = "invalid_device"
	codeInvalidToken    = "invalid_token"
	codeUnauthorized    = "unauthorized"
	codeForbidden       = "forbidden"
	codeHost            = "host_not_allowed"
	codeCSRF            = "csrf_token"
	codeNotFound        = "not_found"
	codeNoCredential    = "unknown_credential"
	codeNoLane          = "unknown_lane"
	codeNoUpstream      = "unknown_upstream"
	codeLaneFull        = "lane_full"
	codeNoToken         = "unknown_token"
	codeMethod          = "method_not_allowed"
	codeDeviceExists    = "device_exists"
	codeTooManyDevices  = "too_many_devices"
	codeTokenExists     = "token_exists"
	codeTooManyTokens   = "too_many_tokens"
	codeBodyTooLarge    = "body_too_large"
	codeMediaType       = "unsupported_media_type"
	codeTooManyAttempts = "too_many_attempts"
	codeInternal        = "internal"
	codeNotReady        = "not_ready"
	codeTooManyStreams  = "too_many_streams"
	codeBackupRuns      = "backup_runs"
	codeAudit           = "audit_unavailable"
	codeConfig          = "config_wrong"
	codeDebug           = "cannot_debug"
)

// statuses has the HTTP status of each code. docs/api.md explains them; a test holds the two together.
var statuses = map[string]int{
	codeBadQuery:              http.StatusBadRequest,
	codeBadBody:               http.StatusBadRequest,
	codeInvalidDevice:         http.StatusBadRequest,
	codeInvalidToken:          http.StatusBadRequest,
	devices.CodeInvalid:       http.StatusBadRequest,
	codeUnauthorized:          http.StatusUnauthorized,
	codeForbidden:             http.StatusForbidden,
	codeHost:                  http.StatusForbidden,
	codeCSRF:                  http.StatusForbidden,
	codeNotFound:              http.StatusNotFound,
	devices.CodeUnknownDevice: http.StatusNotFound,
	devices.CodeUnknown:       http.StatusNotFound,
	codeNoCredential:          http.StatusNotFound,
	codeNoLane:                http.StatusNotFound,
	codeNoUpstream:            http.StatusNotFound,
	codeNoToken:               http.StatusNotFound,
	codeMethod:                http.StatusMethodNotAllowed,
	devices.CodeDisabled:      http.StatusConflict,
	devices.CodeConflict:      http.StatusConflict,
	devices.CodeEnded:         http.StatusConflict,
	codeLaneFull:              http.StatusConflict,
	codeDeviceExists:          http.StatusConflict,
	codeTooManyDevices:        http.StatusConflict,
	codeTokenExists:           http.StatusConflict,
	codeTooManyTokens:         http.StatusConflict,
	codeBackupRuns:            http.StatusConflict,
	codeBodyTooLarge:          http.StatusRequestEntityTooLarge,
	devices.CodeTooLarge:      http.StatusRequestEntityTooLarge,
	codeMediaType:             http.StatusUnsupportedMediaType,
	devices.CodeExpired:       http.StatusUnprocessableEntity,
	devices.CodeQueueFull:     http.StatusTooManyRequests,
	codeTooManyAttempts:       http.StatusTooManyRequests,
	codeInternal:              http.StatusInternalServerError,
	codeNotReady:              http.StatusServiceUnavailable,
	devices.CodeUnavailable:   http.StatusServiceUnavailable,
	codeTooManyStreams:        http.StatusServiceUnavailable,
	codeConfig:                http.StatusUnprocessableEntity,
	codeDebug:                 http.StatusConflict,
	codeAudit:                 http.StatusServiceUnavailable,
}

// retries has what is said to callers whose turn comes by itself, in seconds.
var retries = map[string]int{devices.CodeQueueFull: 10, devices.CodeUnavailable: 5, codeTooManyStreams: 5}

// asFailure says what the caller is told of err; ok is false for an error that nobody expected.
func asFailure(err error) (f *failure, ok bool) {
	var refusal *devices.Refusal
	switch {
	case errors.As(err, &f):
	case errors.As(err, &refusal):
		f = &failure{code: refusal.Code, message: refusal.Reason}
	case errors.Is(err, devices.ErrUnknownDevice):
		f = &failure{code: devices.CodeUnknownDevice, message: err.Error()}
	case errors.Is(err, devices.ErrDeviceExists):
		f = &failure{code: codeDeviceExists, message: err.Error()}
	case errors.Is(err, devices.ErrBadID), errors.Is(err, devices.ErrInvalid):
		f = &failure{code: codeInvalidDevice, message: err.Error()}
	case errors.Is(err, devices.ErrNoCredential):
		f = &failure{code: codeNoCredential, message: err.Error()}
	case errors.Is(err, devices.ErrTooManyDevices):
		f = &failure{code: codeTooManyDevices, message: err.Error()}
	case errors.Is(err, devices.ErrDisabled):
		f = &failure{code: devices.CodeDisabled, message: err.Error()}
	case errors.Is(err, spool.ErrNoLane):
		f = &failure{code: codeNoLane, message: err.Error()}
	case errors.Is(err, spool.ErrNotWaiting):
		f = &failure{code: codeNoUpstream, message: err.Error()}
	case errors.Is(err, ErrTokenExists):
		f = &failure{code: codeTokenExists, message: err.Error()}
	case errors.Is(err, ErrTooManyTokens):
		f = &failure{code: codeTooManyTokens, message: err.Error()}
	case errors.Is(err, ErrBackupRuns):
		f = &failure{code: codeBackupRuns, message: err.Error() + ": wait until it has ended"}
	case errors.Is(err, ErrConfig):
		f = &failure{code: codeConfig, message: err.Error()}
	case errors.Is(err, ErrDebug):
		f = &failure{code: codeDebug, message: err.Error()}
	case errors.Is(err, ErrNoToken):
		f = &failure{code: codeNoToken, message: err.Error()}
	default:
		return nil, false
	}
	if _, known := statuses[f.code]; !known {
		return nil, false
	}
	return f, true
}

// refuse answers with err.
func (s *Server) refuse(c *call, err error) {
	f, expected := asFailure(err)
	switch {
	case expected:
	case errors.Is(err, context.Canceled) && c.r.Context().Err() != nil:
		f = failf(devices.CodeUnavailable, "the caller went away") // nobody reads it
	case c.row.changes():
		// What is not the caller's fault is that it could not be stored.
		s.log.Warn("change could not be stored", "route", c.row.name(), "who", c.who, "object", c.object, "err", err)
		f = failf(devices.CodeUnavailable, "it could not be stored: %v; try again, and see the log of the gateway if that goes on", err)
	default:
		id := newID()
		s.log.Error("request failed", "id", id, "route", c.row.name(), "who", c.who, "err", err)
		f = failf(codeInternal, "this is not your fault; the log of the gateway says more about failure %s", id)
	}
	c.code = f.code
	if f.code == codeUnauthorized && c.w.Header().Get("WWW-Authenticate") == "" {
		c.w.Header().Set("WWW-Authenticate", "Bearer")
	}
	if f.retry == 0 {
		f.retry = retries[f.code]
	}
	if f.retry > 0 {
		c.w.Header().Set("Retry-After", strconv.Itoa(f.retry))
	}
	reply(c.w, statuses[f.code], Error{ErrorBody{f.code, f.message}})
}
