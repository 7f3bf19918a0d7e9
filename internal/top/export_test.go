package top

import (
	"context"
	"time"

	tea "charm.land/bubbletea/v2"

	"holdfast/gateway/httpapi"
)

// Screen is a model with a clock of the test's.
type Screen struct {
	m   *model
	Now time.Time
}

// NewScreen makes one that looks at what the test gives it.
func NewScreen(look func() (*httpapi.Status, error)) *Screen {
	s := &Screen{}
	s.m = &model{
		ctx: context.Background(), every: time.Millisecond, now: func() time.Time { return s.Now }, width: 80, height: 24,
		look: func(context.Context) (*httpapi.Status, error) { return look() },
	}
	return s
}

// Look looks once. more: it will look again.
func (s *Screen) Look() (more bool) {
	_, cmd := s.m.Update(s.m.ask())
	return cmd != nil
}

// Resize, Press and View are what the terminal does.
func (s *Screen) Resize(w, h int) { s.m.Update(tea.WindowSizeMsg{Width: w, Height: h}) }

func (s *Screen) Press(k tea.KeyPressMsg) (quits bool) {
	_, cmd := s.m.Update(k)
	if cmd == nil {
		return false
	}
	_, quits = cmd().(tea.QuitMsg)
	return quits
}
func (s *Screen) View() string { return s.m.screen() }
